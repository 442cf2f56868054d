"""Measure what each process holds."""

from man_mm.benchmark.sharding_costs import main

if __name__ == '__main__':
    main()
