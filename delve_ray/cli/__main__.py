"""`python -m delve_ray.cli`, where the command is not installed."""

import sys

from delve_ray.cli import main

if __name__ == "__main__":
    sys.exit(main())
