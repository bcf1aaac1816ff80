"""Build the images and try them as a cluster would run them: `python -m tests.deploy.images`.

`engine` runs buildah and podman with a storage of their own, `building` builds, `trying` runs containers and
checks them, `report` has the table.
"""
