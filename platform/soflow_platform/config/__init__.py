"""What a sweep file may say, where each value came from, and the checks made before anything starts."""
