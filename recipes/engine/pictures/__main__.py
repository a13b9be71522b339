"""`python -m recipes.engine.pictures`: the package itself is imported with the engine."""

import sys

from recipes.engine.pictures import main

if __name__ == "__main__":
    sys.exit(main())
