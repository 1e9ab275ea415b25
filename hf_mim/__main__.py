"""Makes `python -m hf_mim` the same as the command `hf-mim`."""

import sys

from hf_mim.cli import main


if __name__ == "__main__":
    sys.exit(main())
