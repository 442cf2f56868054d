"""Measure training schemes side by side."""

from man_mm.benchmark.scheme_costs import main

if __name__ == '__main__':
    main()
