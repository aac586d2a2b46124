"""`python -m alitok_fast.cli`, for torchrun."""

from alitok_fast.cli.app import main

if __name__ == "__main__":
    main()
