"""What injection puts into a base: mixtures on linear layers, routers, taps."""
