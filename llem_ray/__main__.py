"""`python -m llem_ray` is `llem-ray`."""

from llem_ray.cli.main import main

if __name__ == "__main__":
    main()
