"""What PostgreSQL's own catalog says of a schema: two that are described alike are alike."""

from typing import Any

import psycopg

# Each kind of thing with all that may differ about it. Column order is compared too: steps may only add columns where
# schema.sql has them, at the end, so that a `SELECT *` or a COPY without names reads the same everywhere. PostgreSQL's
# own objects have ids below 16384 (FirstNormalObjectId).
_QUERIES = {
    # Whatever kind of thing is there that none of the others looks into (types, operators, views, statistics).
    "things": """
        SELECT type, identity FROM pg_depend, pg_identify_object(classid, objid, objsubid)
        WHERE refclassid = 'pg_namespace'::regclass AND refobjid = 'public'::regnamespace
    """,
    "relations": """
        SELECT relname, relkind, relpersistence, reloptions, relam, relreplident, relrowsecurity, relforcerowsecurity,
            relowner::regrole, relacl, reltablespace, CASE WHEN relkind IN ('v', 'm') THEN pg_get_viewdef(oid) END
        FROM pg_class WHERE relnamespace = 'public'::regnamespace
    """,
    "columns": """
        SELECT relname, attnum, attname, format_type(atttypid, atttypmod), attnotnull, attidentity, attgenerated,
            pg_get_expr(adbin, adrelid), attstorage, attcompression, attcollation::regcollation, attstattarget,
            attoptions, attacl
        FROM pg_attribute JOIN pg_class c ON c.oid = attrelid
            LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
        WHERE relnamespace = 'public'::regnamespace AND attnum > 0
    """,
    "constraints": """
        SELECT conrelid::regclass, conname, pg_get_constraintdef(oid), convalidated FROM pg_constraint
        WHERE connamespace = 'public'::regnamespace
    """,
    "indexes": """
        SELECT pg_get_indexdef(indexrelid), indisvalid, indisclustered, indisreplident FROM pg_index
        JOIN pg_class c ON c.oid = indexrelid WHERE relnamespace = 'public'::regnamespace
    """,
    # Those of foreign keys bear numbers in their names.
    "triggers": """
        SELECT tgrelid::regclass, tgfoid::regprocedure, tgenabled,
            CASE WHEN NOT tgisinternal THEN pg_get_triggerdef(t.oid) END
        FROM pg_trigger t JOIN pg_class c ON c.oid = tgrelid WHERE relnamespace = 'public'::regnamespace
    """,
    "functions": """
        SELECT oid::regprocedure, pg_get_functiondef(oid), proowner::regrole, proacl FROM pg_proc
        WHERE pronamespace = 'public'::regnamespace AND prokind IN ('f', 'p')
    """,
    "sequences": """
        SELECT seqrelid::regclass, seqtypid::regtype, seqstart, seqincrement, seqmin, seqmax, seqcache, seqcycle,
            (SELECT pg_describe_object(refclassid, refobjid, refobjsubid) || ' ' || deptype::text FROM pg_depend
             WHERE classid = 'pg_class'::regclass AND objid = seqrelid AND refclassid = classid)
        FROM pg_sequence
    """,
    "rules": "SELECT tablename, rulename, definition FROM pg_rules WHERE schemaname = 'public'",
    "policies": "SELECT tablename, policyname, cmd, roles, qual, with_check FROM pg_policies",
    "comments": """
        SELECT pg_describe_object(classoid, objoid, objsubid), description FROM pg_description
        WHERE objoid >= 16384
    """,
    "schemas": """
        SELECT nspname, nspacl FROM pg_namespace WHERE oid >= 16384 AND nspname !~ '^pg_(toast_)?temp_'
            OR nspname = 'public'
    """,
    "extensions": "SELECT extname FROM pg_extension",
    "event triggers": "SELECT evtname FROM pg_event_trigger",
    "default privileges": "SELECT defaclnamespace::regnamespace, defaclobjtype, defaclacl FROM pg_default_acl",
}


def described(conninfo: str) -> dict[str, list[str]]:
    """Return all that there is in a database, by kind."""
    with psycopg.connect(conninfo) as conn:
        return {kind: _lines(conn, query) for kind, query in _QUERIES.items()}


def _lines(conn: psycopg.Connection[Any], query: str) -> list[str]:
    # As text: PostgreSQL's own types for its catalog have no order, or no meaning here.
    found = conn.execute(f"SELECT t::text FROM ({query}) t".encode())  # noqa: S608 - all of them stand above
    return sorted(line for (line,) in found)
