"""`python -m nbg_assets.cli`."""

from nbg_assets.cli.main import main

main()
