"""Make the data set of fashion."""

from man_mm.datasets.make_fashion import main

if __name__ == '__main__':
    main()
