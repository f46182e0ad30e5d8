"""A small site, tracked by the real tracking.js, on which a newcomer sees events come in."""

from flask import Blueprint, Response, abort, render_template

from appliance.config import DEMO_SITE

_PAGES = ("home", "article", "contact")

_PRICE_LIST = "article,price\nApples,2.40\nPears,3.10\nQuinces,4.80\n"


def blueprint() -> Blueprint:
    """Return the demo's routes; they exist only while server.demo is on."""
    routes = Blueprint("demo", __name__, url_prefix="/demo", template_folder="templates", static_folder="static")

    @routes.get("/")
    @routes.get("/<page>")
    def page(page: str = "home") -> str:
        if page not in _PAGES:
            abort(404)
        return render_template(f"demo/{page}.html", site=DEMO_SITE)

    @routes.post("/contact")
    def contact() -> str:
        return render_template("demo/contact.html", site=DEMO_SITE, thanks=True)

    @routes.get("/prices.csv")
    def price_list() -> Response:
        answer = Response(_PRICE_LIST, mimetype="text/csv")
        answer.headers["Content-Disposition"] = 'attachment; filename="prices.csv"'
        return answer

    return routes
