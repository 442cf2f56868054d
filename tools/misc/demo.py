"""Train a detector by local learning on built-in images."""

from man_mm.benchmark.demo import main

if __name__ == '__main__':
    main()
