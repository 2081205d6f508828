"""`python -m megallama`."""

from megallama.cli import main

raise SystemExit(main())
