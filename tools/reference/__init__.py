"""Reference pages of the site, made of the source: Python names, command lines, and the contract."""
