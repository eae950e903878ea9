defmodule Bombus.HubTest do
  # Against a server that speaks the Hub's protocol, in real HTTP. Not async: what names the server is
  # the environment.
  use ExUnit.Case

  import ExUnit.CaptureLog

  alias Bombus.{Error, Fixtures, Hub, HubServer, Serving}

  @moduletag :tmp_dir
  @id "owner/name"
  @models Path.expand("../../priv/models", __DIR__)
  @variables ~w(HF_ENDPOINT HF_HOME HF_HUB_CACHE HUGGINGFACE_HUB_CACHE HF_TOKEN HF_TOKEN_PATH
                HUGGING_FACE_HUB_TOKEN HF_HUB_OFFLINE TRANSFORMERS_OFFLINE XDG_CACHE_HOME)

  setup %{tmp_dir: dir} do
    files = Map.put(files(Path.join(@models, "demo")), "README.md", "# A model")
    adapter = files(Path.join(@models, "adapters/pirate"))
    server = HubServer.start(%{@id => files, "owner/adapter" => adapter})
    before = Map.new(@variables, &{&1, System.get_env(&1)})
    Enum.each(@variables, &System.delete_env/1)
    System.put_env(%{"HF_ENDPOINT" => HubServer.url(server), "HF_HOME" => dir})
    Application.put_env(:bombus, :hub_pause, 10)

    on_exit(fn ->
      System.put_env(Map.to_list(before))
      Application.delete_env(:bombus, :hub_pause)
    end)

    %{server: server, files: files, cache: Path.join(dir, "hub")}
  end

  defp files(folder), do: Map.new(File.ls!(folder), &{&1, File.read!(Path.join(folder, &1))})

  defp asked(server), do: for(r <- HubServer.requests(server), do: {r.host, r.method, r.path})

  defp got(server) do
    for %{method: "GET"} = request <- HubServer.requests(server), do: Path.basename(request.path)
  end

  defp heads(server), do: Enum.count(HubServer.requests(server), &(&1.method == "HEAD"))

  defp reason({:error, %Error{reason: reason}}), do: reason

  # A closed port of this machine.
  defp nowhere do
    {:ok, socket} = :gen_tcp.listen(0, ip: {127, 0, 0, 1})
    {:ok, port} = :inet.port(socket)
    :gen_tcp.close(socket)
    "http://127.0.0.1:#{port}"
  end

  defp blob(cache, bytes, id \\ "owner/large") do
    Path.join([
      cache,
      "models--" <> String.replace(id, "/", "--"),
      "blobs",
      HubServer.etag(bytes)
    ])
  end

  # Larger than any buffer on the way, so that a cut is in its midst.
  defp large(server, bytes \\ 3_000_000) do
    weights = :rand.bytes(bytes)
    files = %{"config.json" => "{}", "model.safetensors" => weights}
    HubServer.push(server, "owner/large", files)
    weights
  end

  defp download(id \\ "owner/large", options \\ []) do
    Hub.download(id, [kind: :model] ++ options)
  end

  describe "loading" do
    test "a model, its tokenizer and an adapter speak as those in folders do", %{
      server: server,
      files: files
    } do
      for source <- [{:hf, @id}, {:hf, @id, revision: "main"}] do
        model = Bombus.load_model!(source)
        tokenizer = Bombus.load_tokenizer!(source)
        adapter = Bombus.load_adapter!({:hf, "owner/adapter"})
        options = [adapter: adapter, max_new_tokens: 20]
        %{results: [%{text: text}]} = run(model, tokenizer, options)
        own = [adapter: Bombus.load_adapter!({:demo, "pirate"}), max_new_tokens: 20]
        demo = run(Bombus.load_model!(:demo), Bombus.load_tokenizer!(:demo), own)
        assert %{results: [%{text: ^text}]} = demo
        assert inspect(model) =~ @id
      end

      # Once, and no others; the listing is for templates that have names.
      assert Enum.sort(got(server) -- [HubServer.commit(files)]) ==
               Enum.sort(
                 ~w(config.json generation_config.json model.safetensors tokenizer_config.json
                    tokenizer.json adapter_config.json adapters.safetensors) ++
                   for name <- ["model.safetensors", "tokenizer.json", "adapters.safetensors"] do
                     # From the other host.
                     name |> bytes() |> HubServer.etag()
                   end
               )
    end

    defp bytes("adapters.safetensors" = name),
      do: File.read!(Path.join([@models, "adapters/pirate", name]))

    defp bytes(name), do: File.read!(Path.join([@models, "demo", name]))

    defp run(model, tokenizer, options) do
      model |> Serving.new(tokenizer, options) |> Serving.run("Write a post about coffee")
    end

    test "templates that have names come along, as in a folder", %{server: server, files: files} do
      template = &"#{&1}: {{ messages[0].content }}{% if tools %}{% endif %}"
      names = ~w(tool_use rag)

      more =
        Map.new(names, &{"additional_chat_templates/#{&1}.jinja", template.(&1)})
        |> Map.put("chat_template.jinja", template.("default"))

      # What is no template there, or lies deeper, is not wanted.
      others = %{
        "additional_chat_templates/README.md" => "a",
        "additional_chat_templates/old/rag.jinja" => "a",
        "other/additional_chat_templates/rag.jinja" => "a"
      }

      repository = files |> Map.merge(more) |> Map.merge(others)
      within = Map.new(repository, fn {path, bytes} -> {"deep/#{path}", bytes} end)
      HubServer.push(server, "owner/templates", repository)
      HubServer.push(server, "owner/within", within)

      for {source, path} <- [
            {{:hf, "owner/templates"}, ""},
            {{:hf, "owner/within", subdir: "deep"}, "deep"}
          ] do
        tokenizer = Bombus.load_tokenizer!(source)
        {id, options} = {elem(source, 1), subdir(source)}
        {:ok, folder} = Hub.download(id, [kind: :tokenizer, offline: true] ++ options)
        assert String.ends_with?(folder, path)

        assert Enum.sort(File.ls!(Path.join(folder, "additional_chat_templates"))) ==
                 ["rag.jinja", "tool_use.jinja"]

        # As transformers 5: `tool_use` where there are tools, else the default, or the one that is named.
        for loaded <- [tokenizer, Bombus.load_tokenizer!({:local, folder})],
            {options, expected} <- [
              {%{}, "default: Hi"},
              {%{tools: [%{type: "function", function: %{name: "f"}}]}, "tool_use: Hi"},
              {%{chat_template: "rag"}, "rag: Hi"}
            ] do
          messages = [%{role: "user", content: "Hi"}]

          assert Bombus.Tokenizer.apply_chat_template(loaded, messages, template_options: options) ==
                   {:ok, expected}
        end

        # What is there needs no listing again.
        HubServer.forget(server)
        assert {:ok, _tokenizer} = Bombus.load_tokenizer(source)
        assert got(server) == []
      end
    end

    defp subdir({:hf, _id}), do: []
    defp subdir({:hf, _id, options}), do: options

    test "more templates than a tokenizer can have are refused", %{server: server, files: files} do
      many = Map.new(1..101, &{"additional_chat_templates/#{&1}.jinja", "a"})
      HubServer.push(server, "owner/many", Map.merge(files, many))
      assert {:error, error} = Bombus.load_tokenizer({:hf, "owner/many"})
      assert error.reason == :bad_tokenizer
      assert error.message =~ "101 chat templates"
    end

    test "what is there needs one question, and none with a commit's hash", %{
      server: server,
      files: files
    } do
      Bombus.load_model!({:hf, @id})
      HubServer.forget(server)
      Bombus.load_model!({:hf, @id})
      assert asked(server) == [{:hub, "HEAD", "/owner/name/resolve/main/config.json"}]
      HubServer.forget(server)
      Bombus.load_model!({:hf, @id, revision: HubServer.commit(files)})
      assert asked(server) == []
    end

    test "in a supervision tree, with a token that no log shows", %{server: server} do
      source = {:hf, @id, auth_token: "hf_secret"}
      options = [model: source, name: HubServing, max_new_tokens: 5]
      refute inspect(Serving.child_spec(options)) =~ "hf_secret"
      start_supervised!({Serving, options})
      assert %{results: [_]} = Serving.batched_run(HubServing, "Write a post")
      assert Enum.all?(HubServer.requests(server), &(authorized?(&1) == (&1.host == :hub)))
    end

    test "shards that an index names, and shards without one", %{server: server, cache: cache} do
      folder = Fixtures.checkpoint("f32-three-shards")
      files = files(folder)
      assert Enum.count(files, fn {name, _} -> name =~ "-of-" end) == 3
      HubServer.push(server, "owner/shards", files)
      assert {:ok, model} = Bombus.load_model({:hf, "owner/shards"})
      {:ok, expected} = Bombus.score(Bombus.load_model!(folder), [1, 2, 3, 4])
      assert Bombus.score(model, [1, 2, 3, 4]) == {:ok, expected}

      index = "model.safetensors.index.json"
      HubServer.push(server, "owner/bare", Map.delete(files, index))
      assert {:ok, model} = Bombus.load_model({:hf, "owner/bare"})
      assert Bombus.score(model, [1, 2, 3, 4]) == {:ok, expected}
      assert Hub.cached?("owner/bare")
      [shard] = Path.wildcard(Path.join(cache, "models--owner--bare/snapshots/*/*-00002-of-*"))
      File.rm!(shard)
      refute Hub.cached?("owner/bare")

      # An index from before, beside a file that has everything.
      whole = files(Fixtures.checkpoint("f32-eos-list"))
      left = JSON.encode!(%{weight_map: %{"a" => "model-00001-of-00002.safetensors"}})
      HubServer.push(server, "owner/left", Map.put(whole, index, left))
      assert {:ok, model} = Bombus.load_model({:hf, "owner/left"})
      assert {:ok, _scores} = Bombus.score(model, [1, 2, 3, 4])
      assert {:ok, _model} = Bombus.load_model({:hf, "owner/left", offline: true})
      # Or beside shards, of which it misses some.
      few = JSON.encode!(%{weight_map: %{"a" => "model-00001-of-00003.safetensors"}})
      HubServer.push(server, "owner/few", Map.put(files, index, few))
      assert {:ok, model} = Bombus.load_model({:hf, "owner/few"})
      assert Bombus.score(model, [1, 2, 3, 4]) == {:ok, expected}
      assert {:ok, _model} = Bombus.load_model({:hf, "owner/few", offline: true})

      hostile = JSON.encode!(%{weight_map: %{"a" => "../../../outside.safetensors"}})
      HubServer.push(server, "owner/hostile", %{"config.json" => "{}", index => hostile})
      assert {:error, error} = Bombus.load_model({:hf, "owner/hostile"})
      assert error.reason == :bad_checkpoint
    end

    test "from a folder within the repository", %{server: server, files: files} do
      HubServer.push(
        server,
        "owner/nested",
        Map.new(files, fn {n, b} -> {"mlx/4bit/#{n}", b} end)
      )

      source = {:hf, "owner/nested", subdir: "mlx/4bit"}
      assert {:ok, _model} = Bombus.load_model(source)
      assert {:ok, _tokenizer} = Bombus.load_tokenizer(source)
      assert {:error, error} = Bombus.load_model({:hf, "owner/nested"})
      assert error.reason == :not_found
      assert error.message =~ "config.json"
    end

    test "for a training, with options that mlx_lm does not have", %{server: server} do
      alias Bombus.Training.LoRA.Options
      # Without options it is mlx_lm's to fetch.
      assert Options.model(@id) == {:ok, @id}
      assert Options.model({:hf, @id}) == {:ok, @id}
      assert asked(server) == []
      assert {:ok, folder} = Options.model({:hf, @id, revision: "main"})
      assert File.exists?(Path.join(folder, "model.safetensors"))
      assert File.exists?(Path.join(folder, "tokenizer.json"))
    end

    test "a branch, a tag, a commit, and what is new in a branch", %{server: server, files: files} do
      HubServer.push(server, @id, %{"config.json" => "{}"}, "refs/pr/1")
      assert {:ok, _model} = Bombus.load_model({:hf, @id})
      assert {:ok, one} = Hub.download(@id, kind: :model)
      commit = HubServer.commit(files)
      assert {:ok, ^one} = Hub.download(@id, kind: :model, revision: commit)
      assert reason(Hub.download(@id, kind: :model, revision: "refs/pr/1")) == :not_found

      HubServer.forget(server)
      HubServer.push(server, @id, Map.put(files, "generation_config.json", "{ }"))
      assert {:ok, two} = Hub.download(@id, kind: :model)
      assert two != one
      # What is the same is not downloaded again.
      assert got(server) == ["generation_config.json"]
      assert File.read!(Path.join(two, "model.safetensors")) == files["model.safetensors"]
      assert {:ok, ^one} = Hub.download(@id, kind: :model, revision: commit, offline: true)
      assert {:ok, ^two} = Hub.download(@id, kind: :model, offline: true)
    end
  end

  describe "the cache" do
    @describetag :python

    defp python(script, arguments) do
      python = System.get_env("BOMBUS_PYTHON") || flunk("BOMBUS_PYTHON is not set")
      script = "import sys\nfrom huggingface_hub import *\n" <> script
      env = [{"HF_HUB_DISABLE_TELEMETRY", "1"}, {"HF_HUB_DISABLE_PROGRESS_BARS", "1"}]

      {output, status} =
        System.cmd(python, ["-c", script | arguments], env: env, stderr_to_stdout: true)

      assert status == 0, output
      output |> String.trim() |> String.split("\n")
    end

    test "what Bombus has downloaded, huggingface_hub finds", %{cache: cache, files: files} do
      {:ok, folder} = Hub.download(@id)

      lines =
        python(
          """
          print(snapshot_download(sys.argv[1], local_files_only=True))
          print(hf_hub_download(sys.argv[1], "model.safetensors", local_files_only=True))
          print(try_to_load_from_cache(sys.argv[1], "chat_template.jinja") is _CACHED_NO_EXIST)
          info = scan_cache_dir()
          print(len(info.repos), len(info.warnings), info.size_on_disk)
          # And online: nothing that is there is downloaded.
          print(hf_hub_download(sys.argv[1], "model.safetensors"))
          """,
          [@id]
        )

      wanted = Map.delete(files, "README.md")
      size = wanted |> Map.values() |> Enum.map(&byte_size/1) |> Enum.sum()
      weights = Path.join(folder, "model.safetensors")
      assert lines == [folder, weights, "True", "1 0 #{size}", weights]
      assert String.starts_with?(folder, cache)
    end

    test "what huggingface_hub has downloaded, Bombus finds", %{server: server} do
      [folder] = python("print(snapshot_download(sys.argv[1]))", [@id])
      HubServer.forget(server)
      assert Hub.cached?(@id)
      assert Hub.cached?({:hf, @id, revision: "main"}, :tokenizer)
      refute Hub.cached?(@id, :adapter)
      assert {:ok, ^folder} = Hub.download(@id)
      assert got(server) == []
      assert {:ok, ^folder} = Hub.download(@id, offline: true)
      assert {:ok, _model} = Bombus.load_model({:hf, @id, offline: true})
    end

    test "a lock that Python holds is waited for", %{cache: cache, server: server} do
      weights = large(server)
      path = Path.join([cache, ".locks/models--owner--large", HubServer.etag(weights) <> ".lock"])
      File.mkdir_p!(Path.dirname(path))

      script = """
      import filelock, sys
      with filelock.FileLock(sys.argv[1]):
        print("locked", flush=True)
        sys.stdin.readline()
      """

      python = System.fetch_env!("BOMBUS_PYTHON")
      arguments = [args: ["-c", script, path], line: 100]
      port = Port.open({:spawn_executable, python}, [:binary | arguments])
      assert_receive {^port, {:data, {:eol, "locked"}}}, 10_000
      download = Task.async(fn -> download() end)
      refute Task.yield(download, 500)
      Port.command(port, "go\n")
      assert {:ok, _folder} = Task.await(download)
    end
  end

  describe "without a network" do
    test "offline, only what is in the cache counts", %{server: server} do
      assert {:error, error} = Bombus.load_model({:hf, @id, offline: true})
      assert error.reason == :offline
      assert error.message =~ @id
      assert asked(server) == []
      refute Hub.cached?(@id)
      Bombus.load_model!({:hf, @id})
      assert Hub.cached?({:hf, @id})
      refute Hub.cached?(@id, :tokenizer)
      HubServer.forget(server)
      System.put_env("HF_HUB_OFFLINE", "1")
      Bombus.load_model!({:hf, @id})
      assert reason(Bombus.load_tokenizer({:hf, @id})) == :offline
      assert reason(Bombus.load_model({:hf, @id, revision: "other"})) == :offline
      assert asked(server) == []
      # The option goes before the environment.
      assert {:ok, _tokenizer} = Bombus.load_tokenizer({:hf, @id, offline: false})
    end

    test "a tokenizer that was interrupted is not taken for whole", %{
      server: server,
      files: files,
      cache: cache
    } do
      files = Map.put(files, "chat_template.jinja", "{{ messages[0].content }}")
      HubServer.push(server, "owner/chat", files)
      commit = HubServer.commit(files)

      for revision <- [commit, "main"] do
        source = {:hf, "owner/chat", revision: revision}
        File.rm_rf!(cache)
        HubServer.fault(server, :hub, "GET", ~r/jinja/, [{400, []}])
        assert reason(Bombus.load_tokenizer(source)) == :server_error
        assert {:ok, %{chat_template?: true}} = Bombus.load_tokenizer(source)
      end

      # Loading asked for the model alone; a download is for all.
      HubServer.push(server, "owner/model", files)
      source = {:hf, "owner/model", revision: commit}
      assert {:ok, _model} = Bombus.load_model(source)
      refute Hub.cached?(source, :tokenizer)
      assert {:ok, _folder} = Hub.download("owner/model", revision: commit)
      assert Hub.cached?(source, :tokenizer)
    end

    test "what is new is worth some patience, though there is something older", %{
      server: server,
      files: files
    } do
      assert {:ok, old} = Hub.download(@id)
      HubServer.push(server, @id, Map.put(files, "generation_config.json", "{ }"))
      answers = [{503, []}, {:cut, 1}, :wrong_bytes]
      HubServer.fault(server, :hub, "GET", ~r/generation_config/, answers)
      {{:ok, new}, _log} = with_log(fn -> Hub.download(@id) end)
      assert new != old
      HubServer.push(server, @id, Map.put(files, "generation_config.json", "{  }"))
      HubServer.fault(server, :hub, "GET", ~r/generation_config/, List.duplicate({503, []}, 5))
      {answer, log} = with_log(fn -> Hub.download(@id) end)
      assert answer == {:ok, new}
      assert log =~ "in the cache"
    end

    test "a half-downloaded model is not in the cache", %{files: files, cache: cache} do
      {:ok, folder} = Hub.download(@id)
      File.rm!(Path.join(folder, "model.safetensors"))
      refute Hub.cached?(@id)
      assert {:error, error} = Bombus.load_model({:hf, @id, offline: true})
      assert error.message =~ "model.safetensors"
      # Its blob is still there, and gets its name again.
      assert {:ok, ^folder} = Hub.download(@id)
      File.rm!(blob(cache, files["model.safetensors"], @id))
      refute Hub.cached?(@id)
      assert {:ok, ^folder} = Hub.download(@id)
      assert File.read!(Path.join(folder, "model.safetensors")) == files["model.safetensors"]
    end

    test "where all is in the cache, it is a warning", %{server: server} do
      Bombus.load_model!({:hf, @id})
      hub = HubServer.url(server)

      for fault <- [:no_network, {503, []}, {429, [{"Retry-After", "100"}]}, {429, []}] do
        if fault == :no_network do
          System.put_env("HF_ENDPOINT", nowhere())
        else
          System.put_env("HF_ENDPOINT", hub)
          HubServer.fault(server, :hub, "HEAD", ~r/config.json/, [fault, fault])
        end

        log = capture_log(fn -> assert {:ok, _model} = Bombus.load_model({:hf, @id}) end)
        assert log =~ "in the cache"
        assert log =~ @id
      end
    end

    test "and where not, an error, after some attempts" do
      System.put_env("HF_ENDPOINT", nowhere())

      log =
        capture_log(fn ->
          assert {:error, error} = Bombus.load_model({:hf, @id})
          assert error.reason == :no_network
          assert error.message =~ "127.0.0.1"
        end)

      assert length(String.split(log, "Trying again")) == 5
      System.put_env("HF_ENDPOINT", "no url")
      assert reason(Bombus.load_model({:hf, @id})) == :server_error
    end
  end

  describe "a refusal" do
    test "has its kind", %{server: server} do
      assert {:error, error} = Bombus.load_model({:hf, "owner/nothing"})
      assert error.reason == :not_found
      assert error.message =~ "owner/nothing"
      assert error.message =~ "HF_TOKEN"
      assert reason(Bombus.load_model({:hf, "owner/nothing", auth_token: "t"})) == :not_found

      assert {:error, error} = Bombus.load_model({:hf, @id, revision: "no-such-branch"})
      assert error.reason == :revision_not_found
      assert error.message =~ "no-such-branch"

      assert {:error, error} = Bombus.load_adapter({:hf, @id})
      assert error.reason == :not_found
      assert error.message =~ "adapter_config.json"
      assert reason(Hub.download("owner/adapter", kind: :tokenizer)) == :not_found
      assert {:ok, _folder} = Hub.download("owner/adapter")

      for {answer, reason, words} <- [
            {{403, [{"X-Error-Code", "GatedRepo"}]}, :gated, ~r"accept.*/owner/name"},
            {{401, [{"X-Error-Code", "GatedRepo"}]}, :gated, ~r"HF_TOKEN"},
            {{401, []}, :unauthorized, ~r"no token was sent.*HF_TOKEN"},
            {{403, []}, :unauthorized, ~r"HF_TOKEN"},
            {{404, []}, :not_found, ~r"owner/name"},
            {{400, []}, :server_error, ~r"400"}
          ] do
        HubServer.fault(server, :hub, "HEAD", ~r/config.json/, [answer])
        assert {:error, error} = Bombus.load_model({:hf, @id})
        assert error.reason == reason
        assert error.message =~ words
      end
    end

    test "that passes is tried again; with the Hub's own pause", %{server: server} do
      busy = {429, [{"Retry-After", "1"}]}
      limited = {429, [{"RateLimit", ~s("resolvers";r=0;t=1)}]}
      HubServer.fault(server, :hub, "HEAD", ~r/config.json/, [{503, []}, busy, limited])
      HubServer.fault(server, :hub, "GET", ~r/config.json/, [{500, []}])
      HubServer.fault(server, :cdn, "GET", ~r/blobs/, [{502, []}, {403, []}])
      started = System.monotonic_time(:millisecond)
      log = capture_log(fn -> assert {:ok, _model} = Bombus.load_model({:hf, @id}) end)
      assert System.monotonic_time(:millisecond) - started >= 2_000
      assert log =~ "Trying again in 1.0 s"
    end

    test "that stays is an error in the end", %{server: server} do
      for {answer, reason} <- [
            {{503, []}, :server_error},
            {{429, [{"Retry-After", "0"}]}, :rate_limited}
          ] do
        HubServer.forget(server)
        HubServer.fault(server, :hub, "HEAD", ~r/config.json/, List.duplicate(answer, 5))
        capture_log(fn -> assert reason(Bombus.load_model({:hf, @id})) == reason end)
        assert heads(server) == 5
      end

      HubServer.forget(server)
      long = {429, [{"Retry-After", "3600"}]}
      HubServer.fault(server, :hub, "HEAD", ~r/config.json/, [long])
      assert {:error, error} = Bombus.load_model({:hf, @id})
      assert error.reason == :rate_limited
      assert error.message =~ "3600 s"
      assert heads(server) == 1
    end

    test "an answer that is no Hub's names no file outside of the cache", %{server: server} do
      for {header, words} <- [{"X-Repo-Commit", "Commit"}, {"ETag", "ETag"}] do
        for value <- [nil, "../../outside", "..", ~s("a/b")] do
          change = fn headers -> [{header, value || ""} | List.keydelete(headers, header, 0)] end
          HubServer.fault(server, :hub, "HEAD", ~r/config.json/, [{:headers, change}])
          assert {:error, error} = Bombus.load_model({:hf, @id})
          assert error.reason == :server_error
          assert error.message =~ words
        end
      end

      around = {302, [{"Location", "/owner/name/resolve/main/config.json"}]}
      HubServer.fault(server, :hub, "HEAD", ~r/config.json/, List.duplicate(around, 11))
      assert {:error, error} = Bombus.load_model({:hf, @id})
      assert error.message =~ "redirects"
    end

    test "of what no Hub says is not remembered", %{server: server, files: files} do
      for file <- ["model.safetensors", "tokenizer_config.json", "config.json"] do
        HubServer.fault(server, :hub, "HEAD", ~r/#{file}/, [{404, []}])
        Hub.download(@id)
        assert {:ok, folder} = Hub.download(@id)
        assert File.read!(Path.join(folder, file)) == files[file]
      end

      # It has none, and does not say of which commit.
      for code <- [[], [{"X-Error-Code", "EntryNotFound"}]] do
        HubServer.fault(server, :hub, "HEAD", ~r/adapter.*config.json/, [{404, code}])
        assert {:ok, _folder} = Hub.download("owner/adapter")
      end
    end

    test "of the host of a file is one of the Hub's, too", %{server: server, cache: cache} do
      large(server)
      busy = {429, [{"Retry-After", "1"}]}
      HubServer.fault(server, :cdn, "GET", ~r/blobs/, [busy])
      {answer, log} = with_log(fn -> download() end)
      assert {:ok, _folder} = answer
      assert log =~ "Trying again in 1.0 s"
      File.rm_rf!(cache)
      forever = {429, [{"Retry-After", "18446744073709551615"}]}
      HubServer.fault(server, :cdn, "GET", ~r/blobs/, [busy, forever])
      {answer, _log} = with_log(fn -> download() end)
      assert reason(answer) == :rate_limited
    end

    test "shows no password of the endpoint's", %{server: server} do
      "http://" <> address = HubServer.url(server)
      System.put_env("HF_ENDPOINT", "http://user:password@" <> address)

      for status <- [401, 403, 404, 500] do
        answers = List.duplicate({status, [{"X-Error-Code", "GatedRepo"}]}, 5)
        HubServer.fault(server, :hub, "HEAD", ~r/config.json/, answers)
        {{:error, error}, log} = with_log(fn -> Bombus.load_model({:hf, @id}) end)
        refute inspect(error) <> log =~ "password"
      end
    end

    test "a redirect's words count, where the file's own host says others", %{server: server} do
      weights = large(server)
      target = "/owner/large/resolve/main/model.safetensors?from=here&to=http://x"

      said = [
        {"Location", "./" <> Path.basename(target)},
        {"X-Linked-Etag", HubServer.etag(weights)},
        {"X-Linked-Size", "#{byte_size(weights)}"}
      ]

      HubServer.fault(server, :hub, "HEAD", ~r/model.safetensors/, [{302, said}])
      HubServer.fault(server, :cdn, "GET", ~r/blobs/, [:wrong_bytes, :wrong_bytes])
      {answer, _log} = with_log(fn -> download() end)
      assert reason(answer) == :bad_download
      assert {:ok, _folder} = download()
    end

    test "a repository that has moved is followed", %{server: server, files: files} do
      HubServer.push(server, "new/home", files)

      for method <- ["HEAD", "GET"], file <- ["config", "tokenizer"] do
        target = "/new/home/resolve/main/#{file}.json"
        moved = {307, [{"Location", target}]}
        HubServer.fault(server, :hub, method, ~r"owner/name.*/#{file}.json", [moved])
      end

      assert {:ok, _model} = Bombus.load_model({:hf, @id})
    end
  end

  describe "a download" do
    test "that is cut goes on where it was", %{server: server} do
      weights = large(server)
      HubServer.fault(server, :cdn, "GET", ~r/blobs/, [{:cut, 1_000_000}, {:cut, 500_000}])
      {{:ok, folder}, _log} = with_log(fn -> download() end)
      assert File.read!(Path.join(folder, "model.safetensors")) == weights

      from =
        for %{host: :cdn} = request <- HubServer.requests(server), do: request.headers["range"]

      assert from == [nil, "bytes=1000000-", "bytes=1500000-"]
    end

    test "that gets nowhere is given up, and what there is stays", %{server: server, cache: cache} do
      weights = large(server)
      cuts = [{:cut, 1_000_000} | List.duplicate({:cut, 0}, 4)]
      HubServer.fault(server, :cdn, "GET", ~r/blobs/, cuts)
      {answer, _log} = with_log(fn -> download() end)
      assert reason(answer) == :no_network
      assert File.stat!(blob(cache, weights) <> ".incomplete").size == 1_000_000
      refute File.exists?(blob(cache, weights))
      refute Hub.cached?("owner/large")
      HubServer.forget(server)
      assert {:ok, folder} = download()
      assert File.read!(Path.join(folder, "model.safetensors")) == weights
      assert [%{headers: %{"range" => "bytes=1000000-"}}] = cdn(server)
      refute File.exists?(blob(cache, weights) <> ".incomplete")
    end

    defp cdn(server), do: for(%{host: :cdn} = request <- HubServer.requests(server), do: request)

    test "whose caller dies stops, and the next one goes on", %{server: server, cache: cache} do
      weights = large(server)
      HubServer.fault(server, :cdn, "GET", ~r/blobs/, [{:trickle, 1_000_000}])
      {pid, monitor} = spawn_monitor(fn -> download() end)
      incomplete = blob(cache, weights) <> ".incomplete"

      Fixtures.assert_soon(fn ->
        match?({:ok, %{size: size}} when size >= 1_000_000, File.stat(incomplete))
      end)

      Process.exit(pid, :kill)
      assert_receive {:DOWN, ^monitor, _, _, _}
      script = "{:ok, _} = Bombus.Hub.download(\"owner/large\", kind: :model)"
      env = [{"HF_ENDPOINT", HubServer.url(server)}, {"HF_HOME", Path.dirname(cache)}]
      task = Task.async(fn -> Fixtures.elixir(script, env) end)
      assert {"", 0} = Task.await(task, 60_000)
      assert File.read!(blob(cache, weights)) == weights
      assert [_first, %{headers: %{"range" => "bytes=100" <> _more}}] = cdn(server)
    end

    test "starts again where the server ignores where it should begin", %{server: server} do
      weights = large(server)
      HubServer.fault(server, :cdn, "GET", ~r/blobs/, [{:cut, 1_000_000}, :no_range])
      {{:ok, folder}, _log} = with_log(fn -> download() end)
      assert File.read!(Path.join(folder, "model.safetensors")) == weights
    end

    test "that always breaks at the same place ends, though something always comes", %{
      server: server
    } do
      large(server)
      # From the second on it is asked for the rest, and sends the beginning again.
      HubServer.fault(server, :cdn, "GET", ~r/blobs/, List.duplicate({:cut_from_0, 1_000_000}, 6))
      {answer, _log} = with_log(fn -> download() end)
      assert reason(answer) == :no_network
    end

    test "with a wrong byte is not used", %{server: server, cache: cache} do
      weights = large(server)
      HubServer.fault(server, :cdn, "GET", ~r/blobs/, [:wrong_bytes])
      {{:ok, folder}, _log} = with_log(fn -> download() end)
      assert File.read!(Path.join(folder, "model.safetensors")) == weights

      for {host, kind} <- [hub: "config.json", cdn: "model.safetensors"] do
        File.rm_rf!(cache)
        HubServer.fault(server, host, "GET", ~r/config|blobs/, [:wrong_bytes, :wrong_bytes])
        {{:error, error}, _log} = with_log(fn -> download() end)
        assert error.reason == :bad_download
        assert error.message =~ "hash"
        assert Path.wildcard(Path.join(cache, "**/#{kind}")) == []
        assert Path.wildcard(Path.join(cache, "**/*.incomplete")) |> Enum.all?(&empty?/1)
      end
    end

    defp empty?(path), do: File.stat!(path).size == 0

    test "goes on from nothing that was something else", %{server: server, cache: cache} do
      weights = large(server)
      incomplete = blob(cache, weights) <> ".incomplete"
      File.mkdir_p!(Path.dirname(incomplete))

      for rubbish <- [:rand.bytes(1000), :rand.bytes(3_000_000), :rand.bytes(3_000_001)] do
        File.rm(blob(cache, weights))
        File.write!(incomplete, rubbish)
        {{:ok, folder}, _log} = with_log(fn -> download() end)
        assert File.read!(Path.join(folder, "model.safetensors")) == weights
      end

      # A blob of the wrong size is no blob.
      {:ok, folder} = download()
      File.write!(blob(cache, weights), "short")
      File.rm!(Path.join(folder, "model.safetensors"))
      assert {:ok, ^folder} = download()
      assert File.read!(Path.join(folder, "model.safetensors")) == weights
    end

    test "with more or fewer bytes than announced is not used", %{server: server} do
      large(server)

      for size <- ["2999999", "3000001"] do
        change = &[{"X-Linked-Size", size} | List.keydelete(&1, "X-Linked-Size", 0)]
        HubServer.fault(server, :hub, "HEAD", ~r/model.safetensors$/, [{:headers, change}])
        {answer, _log} = with_log(fn -> download() end)
        assert reason(answer) == :bad_download
      end

      assert {:ok, _folder} = download()
    end

    test "whose size is not said before it comes is checked as well", %{server: server} do
      files = %{"config.json" => "{}", "model.safetensors" => :rand.bytes(10_000)}
      md5 = &Base.encode16(:crypto.hash(:md5, &1), case: :lower)

      opaque = fn headers ->
        for {name, value} <- headers, do: {name, if(name == "ETag", do: md5.(value), else: value)}
      end

      for {change, n} <- [{& &1, 1}, {opaque, 2}],
          gets <- [[], [{:cut, 5_000}], [:wrong_bytes]] do
        id = "owner/unsized-#{n}#{length(gets)}#{gets == [:wrong_bytes]}"
        HubServer.push(server, id, files)
        heads = List.duplicate({:no_length, change}, 9)
        HubServer.fault(server, :hub, "HEAD", ~r/#{id}/, heads)
        HubServer.fault(server, :hub, "GET", ~r/#{id}.*model/, gets)
        {{:ok, folder}, _log} = with_log(fn -> download(id) end)
        right? = File.read!(Path.join(folder, "model.safetensors")) == files["model.safetensors"]
        # A hash says more than a size.
        assert right? == (n == 1 or gets != [:wrong_bytes])
      end

      # Cut, without a hash, before anybody has said how long it is: not the rest for the whole.
      HubServer.push(server, "owner/rest", files)
      HubServer.fault(server, :hub, "HEAD", ~r/rest/, List.duplicate({:no_length, opaque}, 9))
      HubServer.fault(server, :hub, "GET", ~r/rest.*model/, [{:cut_chunk, 4_000}])
      {{:ok, folder}, _log} = with_log(fn -> download("owner/rest") end)
      assert File.read!(Path.join(folder, "model.safetensors")) == files["model.safetensors"]

      # Nor with it: the hash alone.
      HubServer.push(server, "owner/never", files)

      for method <- ["HEAD", "GET"] do
        HubServer.fault(server, :hub, method, ~r/never/, List.duplicate({:no_length, & &1}, 9))
      end

      assert {:ok, folder} = download("owner/never")
      assert File.read!(Path.join(folder, "model.safetensors")) == files["model.safetensors"]
      HubServer.push(server, "owner/nothing-said", files)

      for method <- ["HEAD", "GET"] do
        answers = List.duplicate({:no_length, opaque}, 9)
        HubServer.fault(server, :hub, method, ~r/nothing-said/, answers)
      end

      {answer, _log} = with_log(fn -> download("owner/nothing-said") end)
      assert reason(answer) == :bad_download
    end

    test "is one for all who want it", %{server: server} do
      weights = large(server)
      tasks = for _ <- 1..8, do: Task.async(fn -> download() end)
      env = [{"HF_ENDPOINT", HubServer.url(server)}, {"HF_HOME", System.get_env("HF_HOME")}]
      script = "{:ok, _} = Bombus.Hub.download(\"owner/large\", kind: :model)"
      others = for _ <- 1..2, do: Task.async(fn -> Fixtures.elixir(script, env) end)
      [{:ok, folder} | _] = answers = Task.await_many(tasks, 60_000)
      assert Enum.all?(answers, &(&1 == {:ok, folder}))
      assert Enum.all?(Task.await_many(others, 60_000), &match?({"", 0}, &1))
      assert File.read!(Path.join(folder, "model.safetensors")) == weights
      assert [_once] = cdn(server)
    end

    test "of another VM at the same time is waited for", %{server: server, cache: cache} do
      weights = large(server)
      HubServer.fault(server, :cdn, "GET", ~r/blobs/, [{:trickle, 1_000_000}])
      env = [{"HF_ENDPOINT", HubServer.url(server)}, {"HF_HOME", Path.dirname(cache)}]
      script = "Bombus.Hub.download(\"owner/large\", kind: :model)"
      port = Port.open({:spawn_executable, System.find_executable("elixir")}, vm(script, env))
      {:os_pid, pid} = Port.info(port, :os_pid)
      incomplete = blob(cache, weights) <> ".incomplete"

      Fixtures.assert_soon(
        fn -> match?({:ok, %{size: size}} when size >= 1_000_000, File.stat(incomplete)) end,
        3_000
      )

      me = self()
      waiting = Task.async(fn -> download("owner/large", on_progress: &send(me, &1)) end)
      refute Task.yield(waiting, 300)
      # The other one's progress is shown meanwhile; with its end the lock is free.
      assert_receive %{bytes: bytes} when bytes >= 1_000_000
      System.cmd("kill", ["-9", "#{pid}"])
      assert {:ok, _folder} = Task.await(waiting)
      assert [_first, %{headers: %{"range" => "bytes=100" <> _more}}] = cdn(server)
    end

    defp vm(script, env) do
      env = for {name, value} <- env, do: {to_charlist(name), to_charlist(value)}
      [args: Fixtures.elixir_arguments(script), env: env]
    end

    test "needs room on the disk", %{server: server, cache: cache} do
      weights = large(server)
      huge = &[{"X-Linked-Size", "9000000000000000"} | List.keydelete(&1, "X-Linked-Size", 0)]
      HubServer.fault(server, :hub, "HEAD", ~r/model.safetensors$/, [{:headers, huge}])
      assert {:error, error} = download()
      assert error.reason == :disk_full
      assert error.message =~ "9000000.0 GB"
      assert cdn(server) == []

      # Nothing can be written to this device: it is full.
      if File.exists?("/dev/full") do
        File.ln_s!("/dev/full", blob(cache, weights) <> ".incomplete")
        assert {:error, error} = download()
        assert error.reason == :disk_full
        assert error.message =~ ".incomplete"
      end
    end

    test "that cannot be written says where", %{tmp_dir: dir} do
      File.write!(Path.join(dir, "file"), "")
      assert {:error, error} = Hub.download(@id, cache_dir: Path.join(dir, "file"))
      assert error.reason == :io
      assert error.message =~ Path.join(dir, "file")
    end

    test "takes no memory", %{server: server, cache: cache} do
      large(server, 60_000_000)

      script = """
      peak = fn ->
        [_, kb] = Regex.run(~r/VmHWM:\\s+(\\d+)/, File.read!("/proc/self/status"))
        String.to_integer(kb)
      end

      {:ok, _} = Bombus.Hub.download("#{@id}")
      before = peak.()
      {:ok, _} = Bombus.Hub.download("owner/large", kind: :model)
      IO.write(peak.() - before)
      """

      env = [{"HF_ENDPOINT", HubServer.url(server)}, {"HF_HOME", Path.dirname(cache)}]

      if File.exists?("/proc/self/status") do
        assert {kilobytes, 0} = Fixtures.elixir(script, env)
        assert String.to_integer(kilobytes) < 20_000
      end
    end
  end

  describe "progress" do
    test "is told to a function, in the caller's process", %{server: server} do
      weights = large(server)
      me = self()
      tell = fn progress -> send(me, {self(), progress}) end

      capture_log(fn ->
        HubServer.fault(server, :cdn, "GET", ~r/blobs/, [{:cut, 1_000_000}, {:cut, 10}])
        assert {:ok, _folder} = download("owner/large", on_progress: tell)
      end)

      total = byte_size(weights) + 2

      assert_received {^me,
                       %{
                         id: "owner/large",
                         bytes: ^total,
                         total: ^total,
                         rate: rate,
                         remaining: 0
                       }}

      assert rate > 0
      assert Enum.all?(progress(), &(&1.bytes <= &1.total))

      # Nothing to tell where nothing comes.
      assert {:ok, _folder} = download("owner/large", on_progress: tell)
      assert progress() == []
      HubServer.push(server, @id, Map.put(files(Path.join(@models, "demo")), "a", ""))
      Bombus.load_model!({:hf, @id}, on_progress: tell)
      Bombus.load_tokenizer!({:hf, @id}, on_progress: tell)
      Bombus.load_adapter!({:hf, "owner/adapter"}, on_progress: tell)
      assert length(progress()) >= 3
    end

    defp progress do
      receive do
        {_pid, progress} -> [progress | progress()]
      after
        0 -> []
      end
    end

    test "whose function raises ends the download", %{server: server} do
      large(server)

      assert_raise RuntimeError, "no", fn ->
        download("owner/large", on_progress: fn _progress -> raise "no" end)
      end

      assert {:ok, _folder} = download()
      assert {:messages, []} = Process.info(self(), :messages)
    end

    test "is a line, where there is a terminal" do
      state = %{id: @id, bytes: 2_300_000_000, total: 4_600_000_000, rate: 52.0e6, remaining: 45}

      assert Hub.Progress.line(state) ==
               "owner/name [##########----------] 50% of 4.6 GB, 52.0 MB/s, 0:45 left"

      assert Hub.Progress.line(%{state | rate: 0.0, remaining: nil}) =~ "0 bytes/s"
      assert Hub.Progress.line(%{state | remaining: 7322}) =~ "2:02:02 left"
    end
  end

  describe "the token" do
    defp authorized?(request), do: request.headers["authorization"] == "Bearer hf_secret"

    test "goes to the endpoint alone", %{server: server, cache: cache} do
      for source <- [{:hf, @id, auth_token: "hf_secret\n"}, {:hf, @id}] do
        File.rm_rf!(cache)
        HubServer.forget(server)
        if tuple_size(source) == 2, do: System.put_env("HF_TOKEN", "hf_secret")
        Bombus.load_model!(source)
        requests = HubServer.requests(server)
        assert Enum.all?(requests, &(authorized?(&1) == (&1.host == :hub)))
        assert Enum.any?(requests, &(&1.host == :cdn))

        refute Enum.any?(
                 requests,
                 &(&1.host == :cdn and Map.has_key?(&1.headers, "authorization"))
               )
      end
    end

    test "is found where huggingface_hub has left it, and can be left out", %{
      server: server,
      tmp_dir: dir
    } do
      File.write!(Path.join(dir, "token"), "hf_secret\n")
      System.put_env("BOMBUS_TEST_DIR", dir)
      on_exit(fn -> System.delete_env("BOMBUS_TEST_DIR") end)

      # As a shell would read it.
      for home <- [dir, "$BOMBUS_TEST_DIR", "${BOMBUS_TEST_DIR}/."] do
        System.put_env("HF_HOME", home)
        HubServer.forget(server)
        Bombus.load_tokenizer!({:hf, @id})
        assert [%{host: :hub} = request | _] = HubServer.requests(server)
        assert authorized?(request)
      end

      assert Hub.cached?(@id, :tokenizer)
      HubServer.forget(server)
      Bombus.load_tokenizer!({:hf, @id, auth_token: false})
      refute Enum.any?(HubServer.requests(server), &Map.has_key?(&1.headers, "authorization"))
    end

    test "is not shown", %{server: server} do
      secret = "hf_secret"

      log =
        capture_log(fn ->
          HubServer.fault(server, :hub, "HEAD", ~r/config/, [{503, []}, {401, []}])
          {:error, error} = Bombus.load_model({:hf, @id, auth_token: secret})
          refute inspect(error) =~ secret
          HubServer.fault(server, :hub, "HEAD", ~r/config/, [{429, [{"Retry-After", "999"}]}])
          {:error, error} = Bombus.load_model({:hf, @id, auth_token: secret})
          refute inspect(error) =~ secret

          Process.flag(:trap_exit, true)
          HubServer.fault(server, :hub, "HEAD", ~r/config/, [{401, []}])
          child = {Serving, model: {:hf, @id, auth_token: secret}, name: NoServing}
          {:ok, supervisor} = Supervisor.start_link([child], strategy: :one_for_one)

          Fixtures.assert_soon(fn ->
            match?(%{state: {:failed, _error}}, Serving.status(NoServing))
          end)

          status = Serving.status(NoServing)
          refute inspect(status) =~ secret
          refute inspect(status, structs: false) =~ "no token was sent"
          Supervisor.stop(supervisor)
        end)

      refute log =~ secret

      for wrong <- [
            fn -> Bombus.load_model({:hf, :name, auth_token: secret}) end,
            fn -> Bombus.load_model({:hf, @id, auth_tokn: secret}) end,
            fn -> Bombus.load_model({:hf, @id, %{auth_token: secret}}) end,
            fn -> Bombus.load_model({:hf, @id, auth_token: [secret]}) end,
            fn -> Bombus.load_model({:hf, @id, auth_token: secret <> "\n\nX: y"}) end,
            fn -> Bombus.load_model({:hub, @id, auth_token: secret}) end,
            fn -> Bombus.load_model({:hf, @id, [auth_token: secret], :more}) end,
            fn -> Bombus.load_model({:hf, @id}, auth_token: secret) end,
            fn -> Bombus.load_model({:hf, @id, auth_token: secret, cache_dir: "/\xff"}) end,
            fn -> Hub.cached?({:hf, @id, auth_token: secret, cache_dir: "/\xff"}) end,
            fn -> Hub.cached?({:hf, [], auth_token: secret}) end,
            fn -> Hub.cached?({:hub, @id, auth_token: secret}) end,
            fn -> Serving.child_spec(name: A, model: {:hf, @id}, auth_token: secret) end
          ] do
        error = assert_raise ArgumentError, wrong
        refute Exception.message(error) =~ secret
      end
    end
  end

  test "what is written wrongly raises" do
    for {source, words} <- [
          {{:hf, "owner/na me"}, "owner/name"},
          {{:hf, "../x"}, "owner/name"},
          {{:hf, "a/b/c"}, "owner/name"},
          {{:hf, "https://huggingface.co/a/b"}, "owner/name"},
          {{:hf, @id, revision: "../../x"}, ":revision"},
          {{:hf, @id, revision: ""}, ":revision"},
          {{:hf, @id, subdir: "../x"}, ":subdir"},
          {{:hf, @id, subdir: 1}, ":subdir"},
          {{:hf, @id, offline: "yes"}, ":offline"},
          {{:hf, @id, cache_dir: 1}, ":cache_dir"},
          {{:hf, @id, on_progress: 1}, ":on_progress"},
          {{:hf, @id, [:offline]}, "keyword list"}
        ] do
      error = assert_raise ArgumentError, fn -> Bombus.load_model(source) end
      assert error.message =~ words
    end

    assert_raise ArgumentError, ~r/:on_progress/, fn ->
      Bombus.load_model({:hf, @id}, on_progress: 1)
    end

    assert_raise ArgumentError, ~r/:kind/, fn -> Hub.download(@id, kind: :weights) end
  end
end
