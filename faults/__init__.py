"""Pure judgement of failures, and the tools that cause them on purpose."""
