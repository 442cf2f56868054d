"""Make the data set of scenes."""

from man_mm.datasets.make_scenes import main

if __name__ == '__main__':
    main()
