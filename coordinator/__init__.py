"""The gateway: intake, gate, route, dispatch, collect, decide, commit, answer; and the embedded servers around them."""
