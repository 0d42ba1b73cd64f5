"""Networks of the papers that the experiments alone need."""
