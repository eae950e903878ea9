defmodule Bombus.MessagesTest do
  # Messages, tools and template options as the chat template sees them.
  use ExUnit.Case, async: true

  alias Bombus.{Error, Fixtures, Serving}
  alias Bombus.Tokenizer.Messages

  @tokenizer %{template_options: ~w(tools documents x)}

  defp prompt(messages, options \\ %{}), do: Messages.prompt(messages, options, @tokenizer)

  defp messages(messages) do
    {:ok, {:chat, json, _options}} = prompt(messages)
    json
  end

  defp options(options) do
    {:ok, {:chat, _messages, json}} = prompt([%{role: "user", content: "hi"}], options)
    json
  end

  describe "messages" do
    test "roles and names are atoms or strings" do
      expected = ~s([{"role":"user","content":"hi"}])

      for message <- [
            %{role: "user", content: "hi"},
            %{role: :user, content: "hi"},
            %{"role" => "user", "content" => "hi"},
            [role: :user, content: "hi"],
            [{"role", "user"}, {"content", "hi"}]
          ],
          do: assert(messages([message]) == expected)
    end

    test "a list of text parts stays a list, which the template decides on" do
      parts = [
        %{type: "text", text: "a"},
        %{"type" => "text", "text" => "b"},
        [type: :text, text: "c"]
      ]

      json = Enum.map_join(~w(a b c), ",", &~s({"type":"text","text":"#{&1}"}))

      assert messages([%{role: "user", content: parts}]) ==
               ~s([{"role":"user","content":[#{json}]}])

      assert messages([%{role: "user", content: []}]) == ~s([{"role":"user","content":[]}])

      assert_raise ArgumentError, ~r/a part of type "image_url"/, fn ->
        prompt([%{role: "user", content: [%{type: "image_url", image_url: %{url: "x"}}]}])
      end
    end

    test "content that is nil or absent beside tool calls is empty" do
      calls = [%{id: "1", type: "function", function: %{name: "f", arguments: %{b: 1, a: 2}}}]
      json = ~s({"id":"1","type":"function","function":{"name":"f","arguments":{"a":2,"b":1}}})

      assert messages([%{role: "assistant", content: nil, tool_calls: calls}]) ==
               ~s([{"role":"assistant","content":"","tool_calls":[#{json}]}])

      assert messages([%{role: "assistant", tool_calls: calls}]) ==
               ~s([{"role":"assistant","tool_calls":[#{json}],"content":""}])
    end

    test "arguments keep the caller's order, and text stays text" do
      call = fn arguments -> [%{function: [name: "f", arguments: arguments]}] end
      message = &[%{role: "assistant", content: "", tool_calls: call.(&1)}]
      assert messages(message.(b: 1, a: [c: 2])) =~ ~s("arguments":{"b":1,"a":{"c":2}})
      assert messages(message.([{"b", 1}, {"a", nil}])) =~ ~s("arguments":{"b":1,"a":null})
      assert messages(message.(~s({"b":1}))) =~ ~S("arguments":"{\"b\":1}")
    end

    test "what is no message" do
      for wrong <- [
            %{role: "user"},
            %{content: "hi"},
            %{role: nil, content: "hi"},
            %{role: 1, content: "hi"},
            %{role: "user", content: 1},
            %{role: "user", content: [1]},
            %{role: "user", content: [%{type: "text"}]},
            "hi",
            nil,
            {:user, "hi"}
          ] do
        assert_raise ArgumentError, ~r/expected a message to be/, fn -> prompt([wrong]) end
      end

      assert_raise ArgumentError, ~r/every name once/, fn ->
        prompt([%{:role => "user", "role" => "system", :content => "x"}])
      end

      assert_raise ArgumentError, ~r/what JSON has/, fn ->
        prompt([%{role: "user", content: "x", extra: self()}])
      end

      assert_raise ArgumentError, ~r/a list of messages/, fn -> prompt(%{}) end
      assert {:error, %Error{reason: :bad_request}} = prompt([])
      assert {:error, %Error{reason: :bad_request}} = prompt([%{role: "user", content: <<255>>}])
    end
  end

  describe "tools" do
    @schema %{
      required: ["b"],
      properties: %{
        zone: %{description: "Z", type: "string", enum: ["a"]},
        b: %{type: "array", items: %{type: "number", description: "N"}}
      },
      type: "object",
      additionalProperties: false
    }
    @tool %{
      function: %{parameters: @schema, description: "D", name: "f", strict: true},
      type: "function"
    }
    @json ~s([{"type":"function","function":{"name":"f","description":"D","parameters":) <>
            ~s({"type":"object","properties":{"b":{"type":"array","items":{"type":"number",) <>
            ~s("description":"N"}},"zone":{"type":"string","enum":["a"],"description":"Z"}},) <>
            ~s("required":["b"],"additionalProperties":false},"strict":true}}])

    test "of maps have the order of OpenAI's documents" do
      assert options(%{tools: [@tool]}) == ~s({"tools":#{@json}})
      strings = @tool |> JSON.encode!() |> JSON.decode!()
      assert options(%{"tools" => [strings]}) == ~s({"tools":#{@json}})
    end

    test "of more names than a small map holds are in order too" do
      properties = Map.new(1..50, &{:"p#{&1}", %{type: "string"}})
      tool = put_in(@tool, [:function, :parameters], %{type: "object", properties: properties})
      names = Regex.scan(~r/"(p\d+)"/, options(%{tools: [tool]}), capture: :all_but_first)
      assert List.flatten(names) == Enum.sort(for n <- 1..50, do: "p#{n}")
    end

    test "of lists and JSON text have the caller's" do
      json = ~s({"function": {"name": "f", "b": 1, "a": 2}, "type": "function"})
      list = [function: [{"name", "f"}, {"b", 1}, {"a", 2}], type: :function]
      squeezed = ~s({"function":{"name":"f","b":1,"a":2},"type":"function"})
      assert options(%{tools: [list]}) == ~s({"tools":[#{squeezed}]})
      assert options(%{tools: "[#{json}]"}) == ~s({"tools":[#{json}]})
      assert options(%{tools: [json, @tool]}) =~ json
    end

    test "are none where they are nil" do
      assert options(%{tools: nil}) == ~s({"tools":null})
    end

    test "that are none" do
      for wrong <- [1, "x", "{}", ["x"], ["[]"], [1], %{name: "f"}, [[]]] do
        assert_raise ArgumentError, ~r/expected :tools to be/, fn ->
          prompt([%{role: "user", content: "x"}], %{tools: wrong})
        end
      end
    end
  end

  describe "template options" do
    test "that the template does not name" do
      error =
        assert_raise ArgumentError, fn ->
          prompt([%{role: "user", content: "x"}], %{enable_thinking: false})
        end

      assert error.message =~ "no option enable_thinking"
      assert error.message =~ "tools, documents, x"
    end

    test "that every template has" do
      options = %{add_generation_prompt: false, chat_template: "default"}
      assert options(options) == ~s({"add_generation_prompt":false,"chat_template":"default"})
      assert options(%{"x" => %{b: 1, a: :c}}) == ~s({"x":{"a":"c","b":1}})
    end
  end

  test "another VM, whose atoms were made in another order, has the same tokens" do
    encode = """
    #{for name <- ~w(zone required properties function type), do: "_ = String.to_atom(#{inspect(name)})\n"}
    {:ok, {:chat, _, json}} = Bombus.Tokenizer.Messages.prompt([%{role: "user", content: "hi"}],
      %{tools: [%{type: "function", function: %{name: "f", parameters: %{type: "object", required: [], properties: %{zone: %{}, area: %{}}}}}]}, %{template_options: ["tools"]})
    IO.write(json)
    """

    expected =
      ~s({"tools":[{"type":"function","function":{"name":"f","parameters":{"type":"object",) <>
        ~s("properties":{"area":{},"zone":{}},"required":[]}}}]})

    assert {^expected, 0} = Fixtures.elixir(encode)
  end

  describe "with a tokenizer" do
    @describetag :tmp_dir

    defp tokens(dir, template, input) do
      folder = Fixtures.copy(Application.app_dir(:bombus, "priv/models/demo"), dir)
      File.write!(Path.join(folder, "chat_template.jinja"), template)

      serving =
        Serving.new(Bombus.load_model!(:demo), Bombus.load_tokenizer!(folder), max_new_tokens: 0)

      %{results: [%{token_summary: %{input: count}}]} = Serving.run!(serving, input)
      count
    end

    test "the template sees them", %{tmp_dir: dir} do
      input = %{messages: [%{role: :user, content: [%{type: "text", text: "a"}]}]}
      count = tokens(dir, "{{ messages[0].content }}", input)
      assert count == tokens(dir, "a", "x")
      input = %{text: "x", template_options: %{tools: [[b: 1, a: 2]]}}

      assert tokens(dir, "{{ tools | tojson }}", input) ==
               tokens(dir, ~s([{"b": 1, "a": 2}]), "x")
    end

    test "a template of texts gets a list of parts as one text, one of parts a list of one",
         %{tmp_dir: dir} do
      parts = for text <- ["A post", " about coffee"], do: %{type: "text", text: text}
      looped = "{% for part in messages[0].content %}{{ part.text }}{% endfor %}"

      for template <- ["{{ messages[0].content }}", looped],
          content <- ["A post about coffee", parts] do
        input = %{messages: [%{role: "user", content: content}]}
        assert tokens(dir, template, input) == tokens(dir, "A post about coffee", "x")
      end
    end

    test "whole numbers have all their digits, and what is too deep is named", %{tmp_dir: dir} do
      number = 123_456_789_012_345_678_901_234_567_890
      input = %{text: "x", template_options: %{tools: [%{n: number, m: -number}]}}
      text = ~s([{"m": -#{number}, "n": #{number}}])
      assert tokens(dir, "{{ tools | tojson }}", input) == tokens(dir, text, "x")

      folder = Fixtures.copy(Application.app_dir(:bombus, "priv/models/demo"), dir)
      File.write!(Path.join(folder, "chat_template.jinja"), "{{ tools }}{{ messages }}")
      tokenizer = Bombus.load_tokenizer!(folder)
      deep = Enum.reduce(1..200, 1, fn _level, inner -> %{a: inner} end)
      user = %{role: "user", content: "x"}
      apply = &Bombus.Tokenizer.apply_chat_template(tokenizer, &1, template_options: &2)

      for {messages, options, words} <- [
            {[user], %{tools: [deep]},
             "template options: `tools`: lists and objects lie more than 120"},
            {[user, Map.put(user, :x, deep)], %{}, "messages: number 2: lists and objects"},
            {[user], %{tools: [%{a: 10 ** 50}]}, "`tools`: the whole number `1000"}
          ] do
        assert {:error, %Error{reason: :bad_request, message: message}} =
                 apply.(messages, options)

        assert message =~ words
      end
    end

    test "what a template raises is shown in part", %{tmp_dir: dir} do
      folder = Fixtures.copy(Application.app_dir(:bombus, "priv/models/demo"), dir)

      for template <- [
            "{{ raise_exception('no! ' * 1000000) }}",
            "{{ {}['a' * 1000000].b }}"
          ] do
        File.write!(Path.join(folder, "chat_template.jinja"), template)
        tokenizer = Bombus.load_tokenizer!(folder)
        messages = [%{role: "user", content: "x"}]

        assert {:error, %Error{reason: :bad_request, message: message}} =
                 Bombus.Tokenizer.apply_chat_template(tokenizer, messages)

        assert byte_size(message) < 4_000
        assert message =~ "(line 1)"
      end
    end

    test "an option without effect is refused, one that continues works", %{tmp_dir: dir} do
      assert_raise ArgumentError, ~r/no option enable_thinking/, fn ->
        tokens(dir, "a", %{text: "x", template_options: %{enable_thinking: true}})
      end

      template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
      input = %{text: "a", template_options: %{continue_final_message: true}}
      assert tokens(dir, template, input) == tokens(dir, "<a", "x")
    end

    test "a hostile template ends in an error, and others' requests go on", %{tmp_dir: dir} do
      folder = Fixtures.copy(Application.app_dir(:bombus, "priv/models/demo"), dir)
      cycle = "{% set ns=namespace(x=1) %}{% set ns.x=ns %}{{ ns }}"
      File.write!(Path.join(folder, "chat_template.jinja"), cycle)
      model = Bombus.load_model!(:demo)
      serving = Serving.new(model, Bombus.load_tokenizer!(folder), max_new_tokens: 1)
      assert {:error, %Error{reason: :bad_request, message: message}} = Serving.run(serving, "x")
      assert message =~ "too deep"
      assert %{results: [_one]} = Serving.run(serving, %{text: "x", chat_template: false})

      File.write!(
        Path.join(folder, "chat_template.jinja"),
        "{{ #{String.duplicate("-", 4_900)}1 }}"
      )

      assert {:error, %Error{reason: :bad_tokenizer}} = Bombus.load_tokenizer(folder)
    end
  end
end
