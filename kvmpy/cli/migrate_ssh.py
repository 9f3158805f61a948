"""later"""

import argparse


def migrate(args: argparse.Namespace) -> int:
    return 0
