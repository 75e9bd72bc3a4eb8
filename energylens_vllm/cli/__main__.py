"""`python -m energylens_vllm.cli` is `energylens`."""

import sys

from energylens_vllm.cli import main

sys.exit(main())
