"""`hash-password`."""

import sys

import click


@click.command("hash-password", epilog="Example: appliance hash-password < password.txt")
def hash_password() -> None:
    """Ask for a password and print what may stand for it as admin.password: a hash that gives nothing away.

    From a pipe the first line is taken.
    """
    from appliance.admin.passwords import hashed  # noqa: PLC0415 - other commands must not need it

    if sys.stdin.isatty():
        password = click.prompt("Password", hide_input=True, confirmation_prompt="Once more", err=True)
    else:
        password = sys.stdin.readline().rstrip("\r\n")
    if not password:
        raise click.UsageError("no password was given")
    click.echo(hashed(password))
