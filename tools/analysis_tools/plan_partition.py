"""Plan where to cut a network."""

from man_mm.benchmark.partition_plan import main

if __name__ == '__main__':
    main()
