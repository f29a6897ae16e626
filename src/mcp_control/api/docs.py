"""The documentation page: Swagger UI from the package's own files, so that it works without internet."""

from collections.abc import Callable
from importlib import resources
from typing import Final

from mcp_control.api.call import Call, Reply
from mcp_control.api.routing import Endpoint, Handler
from mcp_control.kernel.errors import NotFound

_CSP: Final = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_PAGE: Final = b"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>MCP Server API</title>
<link rel="stylesheet" href="/docs/swagger-ui.css">
<script src="/docs/swagger-ui-bundle.js" defer></script>
<script src="/docs/start.js" defer></script>
</head>
<body><main id="swagger-ui"></main></body>
</html>
"""
_START: Final = b"""const dark = matchMedia("(prefers-color-scheme: dark)");
const shade = () => document.documentElement.classList.toggle("dark-mode", dark.matches);
dark.addEventListener("change", shade);
shade();
window.addEventListener("load", () => {
  SwaggerUIBundle({ url: "/openapi.json", dom_id: "#swagger-ui", deepLinking: true, validatorUrl: null, persistAuthorization: false });
});
"""
_FILES: Final = {
    "swagger-ui.css": b"text/css; charset=utf-8",
    "swagger-ui-bundle.js": b"text/javascript; charset=utf-8",
}


async def docs_page(_call: Call) -> Reply:
    """The API documentation as a page."""
    return Reply(200, _PAGE, ((b"content-type", b"text/html; charset=utf-8"), (b"content-security-policy", _CSP)))


async def docs_start(_call: Call) -> Reply:
    """The script that starts the documentation page."""
    return Reply(200, _START, ((b"content-type", b"text/javascript; charset=utf-8"),))


async def docs_asset(call: Call) -> Reply:
    """A file of the documentation page."""
    name = call.scope["path"].rpartition("/")[2]
    file = resources.files("mcp_control") / "web" / "swagger" / name
    if not file.is_file():
        raise NotFound("the documentation page was not built into this installation; /openapi.json has the document")
    return Reply(200, file.read_bytes(), ((b"content-type", _FILES[name]), (b"cache-control", b"max-age=3600")))


def endpoints(document: Callable[[], bytes], sockets: Callable[[], bytes]) -> tuple[Endpoint, ...]:
    """Return the routes of the documentation; `document` gives the OpenAPI document, `sockets` the AsyncAPI one."""

    async def openapi_document(_call: Call) -> Reply:
        """The OpenAPI 3.1 document."""
        return Reply(200, document(), ((b"content-type", b"application/json"),))

    async def asyncapi_document(_call: Call) -> Reply:
        """The AsyncAPI 3.0 document of the WebSockets."""
        return Reply(200, sockets(), ((b"content-type", b"application/json"),))

    def page(path: str, handler: Handler, media: str, summary: str) -> Endpoint:
        return Endpoint(
            method="GET",
            path=path,
            handler=handler,
            summary=summary,
            tag="system",
            access="open",
            weight="keep",
            produces=(media,),
            absolute=True,
        )

    return (
        page("/openapi.json", openapi_document, "application/json", "The OpenAPI document"),
        page("/asyncapi.json", asyncapi_document, "application/json", "The AsyncAPI document of the WebSockets"),
        page("/docs", docs_page, "text/html", "The API documentation"),
        page("/docs/start.js", docs_start, "text/javascript", "Documentation script"),
        page("/docs/swagger-ui.css", docs_asset, "text/css", "Documentation style"),
        page("/docs/swagger-ui-bundle.js", docs_asset, "text/javascript", "Documentation script"),
    )
