"""`python -m moepp VERB`, also installed as `moepp`."""

import sys

from moepp.cli import main

if __name__ == "__main__":
    sys.exit(main())
