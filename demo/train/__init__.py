"""How the demo models were trained; see demo/README.md."""
