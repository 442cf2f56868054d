"""Measure a pipeline of processes."""

from man_mm.benchmark.pipeline_costs import main

if __name__ == '__main__':
    main()
