"""Where events rest: the database, the table of events, and the ledger of what was exported."""
