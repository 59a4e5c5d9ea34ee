"""The command line of `scripts.benchmark_tables`."""

import argparse
import sys

from scripts.benchmark_tables import check, rewrite


def main(arguments=None):
    """Rewrites the pages, or with `--check` compares them. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Renders the tables of docs/benchmarks from benchmarks/results.")
    parser.add_argument("--check", action="store_true", help="write nothing, exit with status 1 if a page differs")
    args = parser.parse_args(arguments)
    if not args.check:
        for page in rewrite():
            print(f"{page.name}: rewritten")
        return 0
    found = check()
    for page, names in found.items():
        print(f"{page.name}: differs in {', '.join(names)}. Run python -m scripts.benchmark_tables.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
