"""Measure how well each stage tells classes apart."""

from man_mm.benchmark.stage_probes import main

if __name__ == '__main__':
    main()
