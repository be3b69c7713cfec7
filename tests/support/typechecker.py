"""beartype as the tests use it: an int is a float, as YAML and Python's own typing have it."""

from beartype import BeartypeConf, beartype

typechecker = beartype(conf=BeartypeConf(is_pep484_tower=True))
