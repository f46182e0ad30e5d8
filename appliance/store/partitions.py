"""How rows are told apart into objects: by site, and by the hour of their arrival."""

from psycopg import sql

# Of events_log as e. Arrival decides the hour; a row put there by hand may lack it. The hour is the session's time
# zone's: set it to UTC.
SITE = sql.SQL('e.site_id COLLATE "C"')
HOUR = sql.SQL("date_trunc('hour', coalesce(e.created_at, e.timestamp))")
IN_UTC = "SET LOCAL timezone = 'UTC'"
