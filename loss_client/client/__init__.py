"""Client room: sends pairs to one server or several and receives scores; only this room imports gRPC and the stubs."""
