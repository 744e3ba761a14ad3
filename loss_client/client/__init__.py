"""Client: texts in, scores out, from one server or several; the only room that knows the stubs."""
