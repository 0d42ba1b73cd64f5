"""Marion, Wu, Sander, Biau 2023: training keeps residual networks discretised ODEs."""
