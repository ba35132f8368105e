"""The application: all endpoints, and what holds for each of them."""

from functools import cache

from fastapi import Depends, FastAPI, Response

import parallama
from parallama.admin import openapi, problems
from parallama.admin.edge import App, Edge
from parallama.admin.once import Once
from parallama.admin.routes import auth, keys, limits, mappings, me, prices, records, roles, users
from parallama.admin.visit import Office, Open
from parallama.pipeline import Pipeline

ROUTERS = (
    *(auth.router, me.router, users.router, users.tokens, keys.router, roles.router),
    *(limits.router, limits.more, prices.router, mappings.router, records.router),
)


def service(office: Office, once: Pipeline) -> App:
    """What uvicorn serves."""
    told = office.config
    app = Once(api(office), once)
    return Edge(app, seconds=told.admin.timeout_seconds, tell=told.logging.requests)


def api(office: Office | None = None) -> FastAPI:
    """Without an office it can only say what it offers."""
    app = FastAPI(
        title="Parallama's admin API",
        version=parallama.__version__,
        openapi_url=None,  # served below; pages that load scripts from elsewhere are not
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.office = office
    problems.install(app)
    for router in ROUTERS:
        app.router.routes += router.routes  # as they are: nothing is added to them here
    app.openapi = lambda: openapi.describe(app)  # type: ignore[method-assign]

    @cache
    def described() -> str:
        return openapi.text(app)

    @app.get("/admin/openapi.json", include_in_schema=False, dependencies=[Depends(Open())])
    async def get_openapi() -> Response:
        return Response(described(), media_type="application/json")

    return app
