"""How training moves the tangent kernel."""
