"""Studies: runs that measure something and end in a page. `demo` is the first."""
