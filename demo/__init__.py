"""Small trained models to measure on, their loader nodes and the scripts that trained them."""
