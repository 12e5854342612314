"""A Ray to work on: connection, placement groups, actor pool."""
