"""``python -m corrsteer_pl.results``: every system on every task with one model, from nothing to tables and a page."""
