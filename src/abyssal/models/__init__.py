"""Any `nn.Module`: found, loaded, called, borrowed and given back."""
