# `just --list`. The same commands as in CI.

# Format, then check as CI does.
lint:
    ruff format .
    ruff check .
    mypy
    lint-imports

# The quick tier.
test:
    python -m pytest -n 2 --dist loadfile

# The long tier.
full:
    python -m pytest -m full -n 2 --dist loadfile

# The documentation site, as served at the given address.
docs:
    mkdocs serve

# All that CI does, in a fresh environment.
ci:
    .ci/run
