"""Ray: connection, pools of actors, cleanup after lost processes.

connection      connects to a cluster or starts a local Ray; checks that it is alive
capacity        how many trials a cluster holds, node by node
code_shipping   sends this process's code to every node of a cluster
actor_pool      runs a job's tasks on actors, with progress and restarts
placement       releases the placement group of a killed Ray Train controller
session_folder  the private folder of a local Ray's sockets and logs
ray_internals   everything taken from Ray's private modules
"""
