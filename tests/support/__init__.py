"""What several tests share: exact solutions, small networks, a real S3 server, ranks as processes, commands."""
