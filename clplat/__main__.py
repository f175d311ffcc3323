"""`python -m clplat`: the same as the command `clplat`, and it sees packages in the working directory."""

from clplat.cli import main

raise SystemExit(main())
