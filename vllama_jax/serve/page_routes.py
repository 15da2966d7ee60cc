"""The page of the server at `/`, and the routes that only it uses."""



