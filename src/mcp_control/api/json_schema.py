"""How the Structs become JSON Schema in both documents of the interface."""


def any_json(kind: type) -> dict[str, object]:
    """Return the schema of what is opaque: any JSON. For `msgspec.json.schema_components(schema_hook=...)`.

    Raises:
        NotImplementedError: a type that has no JSON form; msgspec then says which.
    """
    if kind is object:
        return {"description": "any JSON value"}
    raise NotImplementedError
