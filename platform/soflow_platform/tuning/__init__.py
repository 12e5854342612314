"""A sweep: search space, record, status, Tune's trial function, driver."""
