"""What `bl.diagnostics.advise` names, beside every other method, in seconds to a solution."""
