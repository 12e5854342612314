"""soflowctl: parse, call one function, print. Heavy imports stand inside the commands, so that --help answers at once."""
