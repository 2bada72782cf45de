"""Compare training with inference for every trainer, or two trained runs with each other.

python run_tests.py [--test NAME] [--json FILE]                    training against the official pipelines
python run_tests.py --compare RUN_A RUN_B [--data DIR] [--out DIR]  two runs, checkpoints or adapters; `base` = none
"""

import sys

from qflux.tools.run_tests import main

if __name__ == "__main__":
    sys.exit(main())
